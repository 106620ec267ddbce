"""A run over many processes: where they meet, engines that die and come back, the gym elsewhere."""
