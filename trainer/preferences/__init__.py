"""Learning from preferences: what people say of pictures, and a LoRA that is trained further by it."""
