"""What extrapolation costs at scale: bytes communicated and held, on paper and counted."""

from .arithmetic import ENGINES, Collective, Precision, communication, memory, sent

__all__ = ["ENGINES", "Collective", "Precision", "communication", "memory", "sent"]
