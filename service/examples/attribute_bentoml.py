"""Python with BentoML's own client, which reads the API from /schema.json.

python service/examples/attribute_bentoml.py photo.jpg cat dog truck
"""

import argparse
import sys
from pathlib import Path

import bentoml

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("photo", type=Path)
parser.add_argument("labels", nargs="*", help="labels to choose from; default: the bundle's own")
parser.add_argument("--url", default="http://127.0.0.1:3000")
parser.add_argument("--key", help="API key, if the service requires one")
arguments = parser.parse_args()

with bentoml.SyncHTTPClient(arguments.url, token=arguments.key, timeout=60) as client:
    try:
        request = {"labels": arguments.labels} if arguments.labels else {}
        answer = client.attribute(image=arguments.photo, request=request)
    except bentoml.exceptions.BentoMLException as error:
        sys.exit(str(error))

for prediction in answer["predictions"]:
    print(f"{prediction['probability']:6.1%}  {prediction['label']}")
