"""`headrace chaos`: real processes and servers under seeded faults, and the check of what is promised."""
