/* SPDX-License-Identifier: Apache-2.0
 *
 * Passwords: PBKDF2-HMAC-SHA512 (RFC 8018). They are machine-made, so that few iterations are enough; a record that asks
 * for many does not parse, since checking one stops the broker for as long as it takes.
 */
#include "bednet.h"

#include <string.h>

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>

#define USUAL_ITERATIONS 101 /* of bednet-ca and mosquitto_passwd; what is spent on those who have no password */


bool secret__password(const struct device_record *device, const char *password)
{
	static const uint8_t nobody[RECORD_HASH_MAX] = {0};
	bool real = device && (device->flags & FLAG_PASSWORD);
	struct slice salt = {nobody, 12}, hash = {nobody, sizeof(nobody)};
	uint32_t iterations = USUAL_ITERATIONS;
	uint8_t derived[RECORD_HASH_MAX];
	size_t len = strlen(password);
	bool equal;

	if(real){
		salt = device->salt;
		hash = device->hash;
		iterations = device->iterations;
	}
	if(len > INT32_MAX || PKCS5_PBKDF2_HMAC(password, (int)len, salt.at, (int)salt.len, (int)iterations, EVP_sha512(),
			(int)hash.len, derived) != 1){
		return false;
	}
	equal = CRYPTO_memcmp(derived, hash.at, hash.len) == 0;
	OPENSSL_cleanse(derived, sizeof(derived));
	return equal && real;
}


bool secret__nobodys_key(const uint8_t secret[SECRET_KEY_LEN], const char *identity, uint8_t key[SECRET_KEY_LEN])
{
	unsigned int len = 0;

	return HMAC(EVP_sha256(), secret, SECRET_KEY_LEN, (const uint8_t *)identity, strlen(identity), key, &len)
			&& len == SECRET_KEY_LEN;
}
