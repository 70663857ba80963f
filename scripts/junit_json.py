"""A JUnit report of pytest as JSON: python scripts/junit_json.py REPORT.xml RESULT.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import torch

report, result = map(Path, sys.argv[1:])
cases = ElementTree.parse(report).getroot().iter("testcase")
outcomes = {f"{case.get('name')}": case[0].tag if len(case) else "passed" for case in cases}
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
result.write_text(json.dumps({"experiment": "tests", "device": device, "outcomes": outcomes}, indent=1))
