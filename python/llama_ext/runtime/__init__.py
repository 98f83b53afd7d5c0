"""What runs around the compiled core: text in and out, prompts, generation."""
