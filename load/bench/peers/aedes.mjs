// SPDX-License-Identifier: Apache-2.0
// aedes behind TLS with client certificates: aedes.mjs PORT CERTIFICATE KEY CA
import { readFileSync } from 'node:fs'
import { createServer } from 'node:tls'
import { Aedes } from 'aedes'

const [port, certificate, key, ca] = process.argv.slice(2)
const aedes = await Aedes.createBroker()
const server = createServer(
  {
    cert: readFileSync(certificate),
    key: readFileSync(key),
    ca: readFileSync(ca),
    requestCert: true,
    rejectUnauthorized: true,
    minVersion: 'TLSv1.2'
  },
  (socket) => {
    socket.setNoDelay(true)
    aedes.handle(socket)
  }
)
// Clients that go away without a word are nothing special here.
server.on('tlsClientError', () => {})
for (const event of ['clientError', 'connectionError']) aedes.on(event, () => {})
server.listen(Number(port), '127.0.0.1')
