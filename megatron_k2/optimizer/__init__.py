"""MuonClip: Muon with QK-Clip (Kimi K2 report, section 2.1)."""
