"""The scores that samplers draw by, measured under ZeRO-3 without ever holding the gradients of all blocks."""
