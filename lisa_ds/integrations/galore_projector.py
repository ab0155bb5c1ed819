"""GaLore's projector, which keeps what it projects with and nothing else. It is a module of its own as galore-torch takes seconds to import."""

from __future__ import annotations

from typing import Any

from galore_torch.galore_projector import GaLoreProjector


class Projector(GaLoreProjector):
    """galore-torch's: of fp32 gradients that keeps a view of the SVD's whole factor, which is as large as the gradient."""

    def get_orthogonal_matrix(self, *args: Any, **kwargs: Any) -> Any:
        """See galore-torch."""
        found = super().get_orthogonal_matrix(*args, **kwargs)
        return [part.clone() for part in found] if isinstance(found, list) else found.clone()
