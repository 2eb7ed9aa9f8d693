"""Python with httpx: why a photo gets its label.

python service/examples/attribute_httpx.py photo.jpg cat dog truck
"""

import argparse
import json
import sys
from pathlib import Path

import httpx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("photo", type=Path)
parser.add_argument("labels", nargs="*", help="labels to choose from; default: the bundle's own")
parser.add_argument("--url", default="http://127.0.0.1:3000")
parser.add_argument("--key", default="none", help="API key, if the service requires one")
arguments = parser.parse_args()

request = {"labels": arguments.labels} if arguments.labels else {}
response = httpx.post(
    f"{arguments.url}/v1/attribute",
    files={"image": arguments.photo.read_bytes(), "request": (None, json.dumps(request))},
    headers={"Authorization": f"Bearer {arguments.key}"},
    timeout=60,
)
if response.is_error:
    error = response.json()["error"]
    sys.exit(f"{response.status_code} {error['code']}: {error['message']} (request {error['request_id']})")

answer = response.json()
for prediction in answer["predictions"]:
    print(f"{prediction['probability']:6.1%}  {prediction['label']}")
why = answer["explanations"][0]
rows = {f"attention {layer}": value for layer, value in enumerate(why["ledger"]["attention"])}
rows |= {f"CLT {layer}": value for layer, value in enumerate(why["ledger"]["clt"])}
print(f"\nWhy {why['target']} (logit {why['logit']:.3f}):")
for name, value in sorted(rows.items(), key=lambda row: -abs(row[1]))[:5]:
    print(f"{value:+.3f}  {name}")
