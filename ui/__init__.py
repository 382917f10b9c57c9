"""The Gradio app: a view of run folders. It loads no model and trains nothing itself."""
