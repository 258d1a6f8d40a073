# SPDX-License-Identifier: Apache-2.0
"""Load tests with a verdict on how much a gateway carries, with all layers on.

- :mod:`load.__main__`: the command (`bednet load`): identities, generator, observer, verdict, report.
- :mod:`load.planning`: who connects, says and hears what: from the site's devices and policy, and a profile;
  :mod:`load.plan`: the plan that comes of it.
- :mod:`load.locustfile`, :mod:`load.generator`: the generator, which Locust runs.
- :mod:`load.remote`, :mod:`load.worker`, :mod:`load.wheels`: generators on other hosts, and :mod:`load.clocks`.
- :mod:`load.client`, :mod:`load.tls`: a device's connection: paho-mqtt on gevent.
- :mod:`load.measure`: latencies, and what was lost, came twice or out of order.
- :mod:`load.observe`: the broker, watched while it is loaded.
- :mod:`load.slo`: thresholds and the verdict. :mod:`load.report`: the report, as HTML and JSON.
- :mod:`load.identities`: test identities that are made for a run and taken back after it.
"""
