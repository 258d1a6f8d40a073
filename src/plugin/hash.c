/* SPDX-License-Identifier: Apache-2.0
 *
 * SHA-256 (FIPS 180-4). OpenSSL looks an algorithm up each time it is asked for by name and makes a context for it, which
 * costs more than the short inputs of here do: so both are made once. The broker has one thread.
 */
#include "bednet.h"

static EVP_MD *algorithm;
static EVP_MD_CTX *context;


bool hash__sha256(const struct slice *parts, size_t count, uint8_t out[HASH_LEN])
{
	size_t i;
	bool good;

	if(algorithm == NULL){
		algorithm = EVP_MD_fetch(NULL, "SHA256", NULL);
	}
	if(context == NULL){
		context = EVP_MD_CTX_new();
	}
	good = algorithm && context && EVP_DigestInit_ex(context, algorithm, NULL) == 1;
	for(i = 0; good && i < count; i++){
		good = EVP_DigestUpdate(context, parts[i].at, parts[i].len) == 1;
	}
	return good && EVP_DigestFinal_ex(context, out, NULL) == 1;
}


void hash__forget(void)
{
	EVP_MD_CTX_free(context);
	EVP_MD_free(algorithm);
	context = NULL;
	algorithm = NULL;
}
