"""Callbacks: from the rows that an ending wrote to the receivers' servers.

`guard` decides which addresses may be dialled, `sender` makes one attempt, `deliverer`
takes due deliveries from the store and writes down what came of them.
"""

from headrace_workers.webhooks.deliverer import Deliverer
from headrace_workers.webhooks.guard import Guard
from headrace_workers.webhooks.sender import Delivered, Failed, Gone, Sender

__all__ = ["Delivered", "Deliverer", "Failed", "Gone", "Guard", "Sender"]
