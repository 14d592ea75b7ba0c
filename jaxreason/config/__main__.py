"""Prints the JSON Schema of the configs: python -m jaxreason.config > configs/schema.json"""

import json

from jaxreason.config import json_schema

print(json.dumps(json_schema(), indent=1))
