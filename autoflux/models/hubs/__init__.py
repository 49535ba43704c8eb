"""Getting models from Hugging Face and ModelScope into the caches that both hubs' own tools use."""
