"""The part of Kustomize that our manifests use, so that they can be checked where it is not installed.

Resources, components, namespace, labels with `pairs`, images, strategic merge patches and JSON patches (test, replace).
Anything else in a kustomization is refused, not ignored. test_kubernetes.py compares the result with Kustomize's own.
"""

import copy

import yaml

SUPPORTED = {"apiVersion", "kind", "resources", "components", "namespace", "labels", "images", "patches"}
CLUSTER_WIDE = {"Namespace"}
MERGE_KEYS = {"containers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath"}


def render(folder):
    """The objects of a kustomization, in no particular order."""
    return _apply(folder, [])


def _apply(folder, objects):
    """`objects`, with the additions and changes of the kustomization in `folder`."""
    spec = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(spec) - SUPPORTED:
        raise NotImplementedError(f"{folder}: {unknown}")
    for name in spec.get("resources", []):
        path = folder / name
        objects = objects + (render(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text())))
    for name in spec.get("components", []):
        objects = _apply(folder / name, objects)
    for patch in spec.get("patches", []):
        objects = _patched(folder, objects, patch)
    for resource in objects:
        if "namespace" in spec and resource["kind"] not in CLUSTER_WIDE:
            resource["metadata"]["namespace"] = spec["namespace"]
        for labels in spec.get("labels", []):
            resource["metadata"].setdefault("labels", {}).update(labels["pairs"])
        for container in resource["spec"]["template"]["spec"]["containers"] if resource["kind"] == "Deployment" else []:
            for image in spec.get("images", []):
                if container["image"].partition(":")[0] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return objects


def _patched(folder, objects, patch):
    if "path" in patch:
        change = yaml.safe_load((folder / patch["path"]).read_text())
        kind, name = change["kind"], change["metadata"]["name"]
    else:
        kind, name = patch["target"]["kind"], patch["target"]["name"]
    matches = [resource for resource in objects if (resource["kind"], resource["metadata"]["name"]) == (kind, name)]
    if not matches and "target" in patch:
        return objects
    if len(matches) != 1:
        raise ValueError(f"{folder}: a patch for {len(matches)} objects {kind}/{name}")
    new = _merge(matches[0], change) if "path" in patch else _edited(matches[0], yaml.safe_load(patch["patch"]))
    return [new if resource is matches[0] else resource for resource in objects]


def _merge(old, new, field=None):
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: _merge(old.get(key), new.get(key, old.get(key)), key) for key in old | new}
    if isinstance(old, list) and field in MERGE_KEYS:
        key = MERGE_KEYS[field]
        before, after = ({item[key]: item for item in items} for items in (old, new))
        return [_merge(before.get(name), after.get(name, before.get(name))) for name in before | after]
    return new


def _edited(resource, operations):
    resource = copy.deepcopy(resource)
    for operation in operations:
        *parents, last = operation["path"].strip("/").split("/")
        node = resource
        for step in parents:
            node = node[int(step) if isinstance(node, list) else step]
        last = int(last) if isinstance(node, list) else last
        if operation["op"] == "test":
            if node[last] != operation["value"]:
                raise ValueError(f"{operation['path']} is {node[last]}")
        elif operation["op"] == "replace":
            node[last] = operation["value"]
        else:
            raise NotImplementedError(operation["op"])
    return resource
