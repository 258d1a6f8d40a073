/* SPDX-License-Identifier: Apache-2.0
 *
 * What a client's certificate says. TLS has checked its signature at the handshake; a resumed session shows the
 * certificate again without any check, so its times and its serial number are looked at here.
 */
#define _GNU_SOURCE /* timegm */
#include "bednet.h"

#include <string.h>
#include <time.h>

#include <openssl/asn1.h>
#include <openssl/objects.h>


bool cert__name(const X509_NAME *name, char out[BEDNET_ID_MAX + 1])
{
	const X509_NAME_ENTRY *entry;
	const ASN1_STRING *text;
	const char *bytes;
	size_t len;
	int at = X509_NAME_get_index_by_NID((X509_NAME *)(uintptr_t)name, NID_commonName, -1);

	if(at < 0 || X509_NAME_get_index_by_NID((X509_NAME *)(uintptr_t)name, NID_commonName, at) >= 0){
		return false;
	}
	entry = X509_NAME_get_entry(name, at);
	text = entry ? X509_NAME_ENTRY_get_data(entry) : NULL;
	/* Of the strings of X.509, those that hold ASCII as ASCII; what an id may be leaves no more, and no NUL. */
	if(text == NULL || (ASN1_STRING_type(text) != V_ASN1_UTF8STRING
			&& ASN1_STRING_type(text) != V_ASN1_PRINTABLESTRING && ASN1_STRING_type(text) != V_ASN1_IA5STRING)){
		return false;
	}
	bytes = (const char *)ASN1_STRING_get0_data(text);
	len = ASN1_STRING_length(text) < 0 ? 0 : (size_t)ASN1_STRING_length(text);
	if(!record__id_ok(bytes, len)){
		return false;
	}
	memcpy(out, bytes, len);
	out[len] = '\0';
	return true;
}


static bool seconds(const ASN1_TIME *time, int64_t *out)
{
	struct tm tm;

	if(time == NULL || ASN1_TIME_to_tm(time, &tm) != 1){
		return false;
	}
	*out = (int64_t)timegm(&tm);
	return true;
}


bool cert__thumbprint(const X509 *x509, uint8_t out[HASH_LEN])
{
	uint8_t *der = NULL;
	const int len = i2d_X509(x509, &der);
	const bool good = len > 0 && hash__sha256(&(struct slice){der, (size_t)len}, 1, out);

	OPENSSL_free(der);
	return good;
}


bool cert__read(const X509 *x509, struct certificate *out)
{
	const ASN1_INTEGER *serial = X509_get0_serialNumber(x509);
	const uint8_t *bytes;
	size_t len;

	memset(out, 0, sizeof(*out));
	if(serial == NULL || ASN1_STRING_type((const ASN1_STRING *)serial) != V_ASN1_INTEGER){
		return false; /* or a negative one, which no CA may give */
	}
	bytes = ASN1_STRING_get0_data((const ASN1_STRING *)serial);
	len = ASN1_STRING_length((const ASN1_STRING *)serial) < 0 ? 0 : (size_t)ASN1_STRING_length((const ASN1_STRING *)serial);
	while(len > 0 && bytes[0] == 0){
		bytes++;
		len--;
	}
	if(len == 0 || len > sizeof(out->serial)){
		return false;
	}
	memcpy(out->serial, bytes, len);
	out->serial_len = len;
	return cert__name(X509_get_subject_name(x509), out->id) && seconds(X509_get0_notBefore(x509), &out->not_before)
			&& seconds(X509_get0_notAfter(x509), &out->not_after);
}
