/* SPDX-License-Identifier: Apache-2.0
 *
 * The records of issuers, their keys, and ends: what parses stays within itself, and has what it must have.
 */
#include "fuzz.h"


static void within(struct slice part, const uint8_t *data, size_t size)
{
	MUST(part.len == 0 || (part.at >= data && part.at + part.len <= data + size));
}


int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct issuer_record issuer;
	struct role_mapping mapping;
	struct key_record key;
	struct slice text;
	int64_t seconds;
	size_t i, j;

	if(record__issuer((struct slice){data, size}, &issuer)){
		MUST(issuer.leeway <= RECORD_LEEWAY_MAX && issuer.longest > 0 && issuer.algorithms > 0 && issuer.algorithms < 16);
		MUST(issuer.audience_count > 0 && issuer.type_count > 0);
		MUST((issuer.flags & ISSUER_ROLES) || !(issuer.flags & ISSUER_SPACED));
		within(issuer.iss, data, size);
		within(issuer.prefix, data, size);
		for(i = 0; i < issuer.audience_count; i++){
			MUST(record__text(&issuer.audiences, 2, &text));
			within(text, data, size);
		}
		for(i = 0; i < issuer.type_count; i++){
			MUST(record__text(&issuer.types, 1, &text));
			within(text, data, size);
		}
		for(i = 0; i < issuer.mapping_count; i++){
			MUST(record__mapping(&issuer.mappings, &mapping));
			within(mapping.value, data, size);
			for(j = 0; j < mapping.claim_count; j++){
				MUST(record__text(&mapping.claims, 1, &text));
				within(text, data, size);
			}
			MUST(mapping.claims.len == 0);
		}
		MUST(issuer.audiences.len == 0 && issuer.types.len == 0 && issuer.mappings.len == 0);
	}
	if(record__key((struct slice){data, size}, &key)){
		within(key.kid, data, size);
		within(key.spki, data, size);
		MUST(key.spki.len > 0);
	}
	MUST(record__seconds((struct slice){data, size}, &seconds) == (size == 8));
	return 0;
}
