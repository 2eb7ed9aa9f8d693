#!/bin/sh
# curl: the prediction of a photo and the account of it, as JSON.
#   sh service/examples/attribute.sh photo.jpg '{"labels": ["cat", "dog"], "explain": {"contrast": "dog"}}'
set -eu
photo=$1
request=${2:-"{}"}
url=${3:-http://127.0.0.1:3000}
key=${4:-none} # only asked for where the service has VITRINE_API_KEYS

# --fail-with-body: the message of an error is printed too, and curl ends with 22
curl --silent --show-error --fail-with-body --header "Authorization: Bearer $key" \
     --form "image=@$photo" --form "request=$request;type=application/json" "$url/v1/attribute"
echo
