/* SPDX-License-Identifier: Apache-2.0
 *
 * A client's certificate in DER. OpenSSL takes it apart; what we take out of it is an id, or nothing.
 */
#include "fuzz.h"


int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const unsigned char *at = data;
	struct certificate certificate;
	char out[BEDNET_ID_MAX + 1];
	X509 *x509 = d2i_X509(NULL, &at, (long)size);
	X509_NAME *name;

	if(x509){
		if(cert__read(x509, &certificate)){
			MUST(record__id_ok(certificate.id, strlen(certificate.id)));
			MUST(certificate.serial_len > 0 && certificate.serial_len <= sizeof(certificate.serial));
		}
		X509_free(x509);
	}
	at = data;
	name = d2i_X509_NAME(NULL, &at, (long)size);
	if(name){
		if(cert__name(name, out)){
			MUST(record__id_ok(out, strlen(out)));
		}
		X509_NAME_free(name);
	}
	return 0;
}
