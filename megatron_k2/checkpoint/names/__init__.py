"""Which tensor of a release is which part of which Megatron tensor."""
