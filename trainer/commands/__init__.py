"""The commands of `lorasmith`, by when a person needs them; `cli` puts them together."""
