# SPDX-License-Identifier: Apache-2.0
"""A disposable copy of the field: systemd containers that Ansible reaches as it reaches real hosts.

- :mod:`testbed.engine`: a Docker engine that answers.
- :mod:`testbed.image`: host images, built from the Debian mirror that the machine uses.
- :mod:`testbed.lab`: :class:`~testbed.lab.Lab`, the hosts, their network and the generated site folder.
- :mod:`testbed.field`: devices that talk through the gateways.
- :mod:`testbed.attacker`: what a hostile host in the same network can try.
"""
