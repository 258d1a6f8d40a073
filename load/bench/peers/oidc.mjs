// SPDX-License-Identifier: Apache-2.0
// oidc-provider as a token service for devices with certificates, behind a proxy that knows the certificate:
// oidc.mjs SOCKET ISSUER AUDIENCE DEVICE
import { createHash, generateKeyPairSync, randomBytes, X509Certificate } from 'node:crypto'
import Provider from 'oidc-provider'

const [socket, issuer, audience, device] = process.argv.slice(2)
const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
const key = { ...privateKey.export({ format: 'jwk' }), alg: 'ES256', use: 'sig' }
key.kid = createHash('sha256').update(key.x + key.y).digest('base64url')

const certificate = (ctx) => decodeURIComponent(ctx.get('x-bednet-client-cert'))
const provider = new Provider(issuer, {
  clients: [{
    client_id: device,
    grant_types: ['client_credentials'],
    redirect_uris: [],
    response_types: [],
    id_token_signed_response_alg: 'ES256',
    scope: 'plant',
    token_endpoint_auth_method: 'tls_client_auth',
    tls_client_auth_subject_dn: `CN=${device}`,
    tls_client_certificate_bound_access_tokens: true
  }],
  clientAuthMethods: ['tls_client_auth'],
  cookies: { keys: [randomBytes(32).toString('hex')] },
  jwks: { keys: [key] },
  scopes: ['plant'],
  features: {
    clientCredentials: { enabled: true },
    devInteractions: { enabled: false },
    mTLS: {
      enabled: true,
      tlsClientAuth: true,
      certificateBoundAccessTokens: true,
      getCertificate: certificate,
      certificateAuthorized: (ctx) => ctx.get('x-bednet-client-verify') === 'SUCCESS',
      certificateSubjectMatches: (ctx, property, expected) => new X509Certificate(certificate(ctx)).subject === expected
    },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => audience,
      getResourceServerInfo: () => ({
        audience,
        id_token_signed_response_alg: 'ES256',
    scope: 'plant',
        accessTokenFormat: 'jwt',
        accessTokenTTL: 900,
        jwt: { sign: { alg: 'ES256' } }
      })
    }
  }
})
// The proxy speaks TLS.
provider.proxy = true
provider.listen(socket)
