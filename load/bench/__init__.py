# SPDX-License-Identifier: Apache-2.0
"""The benchmark of access control: what it costs a broker, beside other ways to do the same.

- :mod:`load.bench.wire`: as much of MQTT 3.1.1 as a generator needs, and no more.
- :mod:`load.bench.brokers`: the configurations that are compared, and what a running broker uses.
- :mod:`load.bench.rounds`: what is measured, in interleaved rounds; prints JSON.
- :mod:`load.bench.compiling`: what the policy costs on its way to a gateway.
- :mod:`load.bench.report`: docs/benchmarks.md out of that JSON.
"""
