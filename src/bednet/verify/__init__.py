# SPDX-License-Identifier: Apache-2.0
"""Prove from outside that the net of a deployed site holds: what is behind `bednet verify` and `bednet report`.

- :mod:`~bednet.verify.task`: what to verify, and as whom: the input file. :mod:`~bednet.verify.run`: run the checks.
  :mod:`~bednet.verify.report`: what they found, and its file. :mod:`~bednet.verify.table`: that for people.
  :mod:`~bednet.verify.command`: all of it on the command line.
- :mod:`~bednet.verify.gateway`: the list of a gateway's checks, which stand in :mod:`~bednet.verify.tls`,
  :mod:`~bednet.verify.authentication`, :mod:`~bednet.verify.tokens`, :mod:`~bednet.verify.access_control` and
  :mod:`~bednet.verify.limits`. :mod:`~bednet.verify.service`: those of a host of the token service.
- :mod:`~bednet.verify.check`: what a check is; :mod:`~bednet.verify.target` and :mod:`~bednet.verify.forgeries`: what
  it is given; :mod:`~bednet.verify.verdict`: what it says. :mod:`~bednet.verify.jws`: the parts of a token.

A check passes only on the answer it expects. Whatever else happens - another alert, a timeout, a closed port, an error
in the check itself - is a failure: an open broker must never pass because the probe did not understand what it saw.
"""
