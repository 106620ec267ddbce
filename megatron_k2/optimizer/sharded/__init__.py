"""MuonClip over Megatron's ZeRO-1 shards."""
