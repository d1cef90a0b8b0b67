#!/usr/bin/env python3
"""Writes src/protobuf/messages.txt (stdout): the field numbers of every message, read from the generated.proto files under the Go modules' folder
(first argument) and the structs' facts of control/api/src/types.txt (second argument).

A message is a line `package/version Name`; its fields follow, indented: `number name shape [o] [~]`.
shape: s string, i integer, b boolean, d double, y bytes, or a message; `[]` before it a repeated field, `{}` a map of strings to it.
o: a zero value stands for absence (the Go field is no pointer and omitted when empty). ~: the message's fields belong to the struct around it.
"""
import glob, re, sys

root, types_path = sys.argv[1], sys.argv[2]
SCALARS = {"string": "s", "int32": "i", "int64": "i", "uint32": "i", "bool": "b", "double": "d", "bytes": "y"}
SPECIAL = {"Quantity", "IntOrString", "Time", "MicroTime", "RawExtension", "JSON", "JSONSchemaPropsOrArray", "JSONSchemaPropsOrBool",
           "JSONSchemaPropsOrStringArray", "FieldsV1", "Duration", "Verbs", "ExtraValue"}
files = [f for pattern in ("api@*/*/v[12]", "api@*/admissionregistration/v1*", "apimachinery@*/pkg/apis/meta/v1", "apimachinery@*/pkg/runtime", "apimachinery@*/pkg/util/intstr",
                           "apimachinery@*/pkg/api/resource", "apiextensions-apiserver@*/pkg/apis/apiextensions/v1",
                           "kube-aggregator@*/pkg/apis/apiregistration/v1") for f in glob.glob(f"{root}/{pattern}/generated.proto")]

facts, current = {}, None
for line in open(types_path):
    words = line.split()
    if not line.startswith(" "):
        current = facts.setdefault((words[0], words[1]), {})
    else:
        current[words[0]] = "o" in words[2:]


def json_name(message, name, known):
    # A few Go fields gave their protobuf names another case than their JSON names.
    same = [field for field in known or () if field.lower() == name.lower()]
    if same and name not in known:
        return same[0]
    if message != "JSONSchemaProps":
        return name
    if name in ("ref", "schema"):
        return "$" + name
    return re.sub(r"(?<!^)([A-Z])", lambda m: "-" + m[1].lower(), name) if name.startswith("xKubernetes") else name


def place(package):
    return "/".join(package.split(".")[-2:])


for path in sorted(files):
    package, message = None, None
    for line in open(path):
        line = line.strip()
        if found := re.match(r"package ([\w.]+);", line):
            package = found[1]
        elif found := re.match(r"message (\w+) \{", line):
            message = found[1]
            print(place(package), message)
        elif line == "}":
            message = None
        elif message and (found := re.match(r"(optional|repeated|required)? ?(map<string, ([\w.]+)>|[\w.]+) (\w+) = (\d+);", line)):
            label, kind, map_value, name, number = found.groups()
            kind = map_value or kind
            if kind in SCALARS:
                shape = SCALARS[kind]
            else:
                target, _, short = kind.lstrip(".").rpartition(".")
                shape = short if not target or target == package else f"{place(target)}.{short}"
            prefix = "{}" if map_value else "[]" if label == "repeated" else ""
            known = facts.get((place(package), message))
            name = json_name(message, name, known)
            flags = ""
            if known is not None and name in known and known[name]:
                flags += " o"
            if known is not None and name not in known and not prefix and kind not in SCALARS and kind.rpartition(".")[2] not in SPECIAL:
                flags += " ~"
            print(f" {number} {name} {prefix}{shape}{flags}")
