/* SPDX-License-Identifier: Apache-2.0
 *
 * Two topic filters, with a line end between them: what covers, what meets, what they have in common.
 */
#include "fuzz.h"


int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const char *one = (const char *)data, *other;
	const char *end = size ? memchr(data, '\n', size) : NULL;
	size_t one_len, other_len, common_len;
	char *common;

	if(end == NULL){
		return 0;
	}
	one_len = (size_t)(end - one);
	other = end + 1;
	other_len = size - one_len - 1;
	if(!topics__filter_ok(one, one_len) || !topics__filter_ok(other, other_len)){
		return 0;
	}
	MUST(topics__covers(one, one_len, one, one_len));
	if(topics__name_ok(other, other_len)){
		MUST(topics__matches(one, one_len, other, other_len) == topics__covers(one, one_len, other, other_len));
	}
	common = malloc(one_len + other_len + 2);
	MUST(common);
	common_len = topics__intersection(one, one_len, other, other_len, common);
	MUST(common_len == topics__intersection(one, one_len, other, other_len, NULL)
			|| (common_len == 1 && common[0] == '#'));
	if(common_len){
		MUST(topics__filter_ok(common, common_len));
		MUST(topics__covers(one, one_len, common, common_len) && topics__covers(other, other_len, common, common_len));
	}
	if(topics__covers(one, one_len, other, other_len)){
		MUST(common_len > 0 && topics__covers(common, common_len, other, other_len));
	}
	free(common);
	return 0;
}
