"""Loss terms: each turns features and logits into one number and knows nothing about where they came from."""

from vlprompt.objectives.mixture import routing_loss, routing_target, text_to_text_loss

__all__ = ["routing_loss", "routing_target", "text_to_text_loss"]
