"""Guests in other people's training loops: one file each, imported by name, and none of them before it is asked for.

lightning, transformers, accelerate, keras, dcp; tensorboard and logs tell of saves.
"""
