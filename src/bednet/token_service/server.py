# SPDX-License-Identifier: Apache-2.0
"""The settings of gunicorn: ``gunicorn --config python:bednet.token_service.server``.

One process, as a gateway has little memory; threads wait for the database and for OpenSSL, which both let others run.
"""

from __future__ import annotations

import os
import selectors

from gunicorn.workers.gthread import ThreadWorker


class Worker(ThreadWorker):  # type: ignore[misc] # gunicorn has no types
    """gunicorn's worker, but it stops when it is told to, and loses nobody: Debian's sleep for up to a second first."""

    def run(self) -> None:
        """Serve until a signal comes, which also wakes the loop: gunicorn writes a byte into this pipe for each."""
        self.poller.register(self.PIPE[0], selectors.EVENT_READ, lambda pipe: os.read(pipe, 64))
        super().run()

    def accept(self, *listener: object) -> None:
        """Take a connection. One that comes after the signal waits in systemd's socket for the next process."""
        if not self.alive:
            return
        known = set(self.poller.get_map())
        super().accept(*listener)
        # Debian 13's gunicorn lets it wait until there is something to read, and hangs up on it when it stops.
        # nginx has sent its request already: a thread reads it at once, as in the releases before and after.
        for number in set(self.poller.get_map()) - known:
            key = self.poller.get_key(number)
            key.data(key.fileobj)


worker_class = "bednet.token_service.server.Worker"
workers = 1
threads = 8
# Behind nginx, which takes its time with slow clients.
timeout = 30
graceful_timeout = 10
# nginx closes its connections after each answer; one that is kept would keep the service from stopping.
keepalive = 0
# nginx hands over the client's certificate in a header: RSA-4096 needs some 3 KB.
limit_request_field_size = 16_384
limit_request_fields = 50
accesslog = None
errorlog = "-"
loglevel = "warning"
proc_name = "bednet-token-service"
