"""What is trained: the retrieval model, the denoiser beside it in training, the losses, the loop."""
