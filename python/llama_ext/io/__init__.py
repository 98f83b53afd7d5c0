"""Reading and writing files: safetensors, configs, and saves that survive a crash."""
