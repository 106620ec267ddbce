"""The embedded engine: MLA over a cache of latents, in plain PyTorch, on a CPU or a GPU."""
