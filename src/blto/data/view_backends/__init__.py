"""How views are rendered: `fast` (compiled, uint8), `gradient` (compiled, differentiable once), `batched` (torch)."""
