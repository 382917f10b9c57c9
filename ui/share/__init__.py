"""The Share page: files, verified, with what others are told, and where they go."""
