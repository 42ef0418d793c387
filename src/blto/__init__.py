"""blto: bi-level trigger optimisation against contrastive pretraining, its baselines, and what defends against it."""
