"""`headrace demo`: the main job end to end on real parts, with an outage and a crash on purpose."""
