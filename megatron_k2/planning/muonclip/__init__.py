"""MuonClip's plan for a whole model. Unlike the rest of planning it needs torch and Megatron."""
