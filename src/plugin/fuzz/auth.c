/* SPDX-License-Identifier: Apache-2.0
 *
 * Authentication data: the first messages of OAUTHBEARER and of `ace`, and an answer, which is never the right one.
 */
#include "fuzz.h"


static void within(struct slice part, const uint8_t *data, size_t size)
{
	MUST(part.at >= data && part.at + part.len <= data + size);
}


int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static EVP_PKEY *keys[2];
	const struct slice all = {data, size};
	struct challenge challenge = {.nonce = "nonce 1"};
	struct slice first, second;
	size_t i;

	if(!keys[0]){
		keys[0] = EVP_EC_gen("P-256");
		keys[1] = EVP_PKEY_Q_keygen(NULL, NULL, "ED25519");
		MUST(keys[0] && keys[1]);
	}
	if(auth__bearer(all, &first, &second)){
		within(first, data, size);
		within(second, data, size);
		MUST(second.len > 0 && !memchr(second.at, 1, second.len));
	}
	if(auth__ace(all, &first, &second)){
		within(first, data, size);
		within(second, data, size);
		MUST(first.len > 0 && first.len + second.len + 2 == size);
	}
	for(i = 0; i < 2; i++){
		challenge.key = keys[i];
		MUST(!challenge__answered(&challenge, all));
	}
	return 0;
}
