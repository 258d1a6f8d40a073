# SPDX-License-Identifier: Apache-2.0
"""The settings of gunicorn: ``gunicorn --config python:bednet.token_service.server``.

One process, as a gateway has little memory; threads wait for the database and for OpenSSL, which both let others run.
"""

from __future__ import annotations

worker_class = "gthread"
workers = 1
threads = 8
# Behind nginx, which takes its time with slow clients.
timeout = 30
graceful_timeout = 10
keepalive = 30
# nginx hands over the client's certificate in a header: RSA-4096 needs some 3 KB.
limit_request_field_size = 16_384
limit_request_fields = 50
accesslog = None
errorlog = "-"
loglevel = "warning"
proc_name = "bednet-token-service"
