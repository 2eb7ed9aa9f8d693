"""As much of Kustomize as our manifests use, so that they can be checked where it is not installed.

Resources, components, namespace, labels with `pairs`, images, strategic merge patches and JSON patches (test, replace).
Anything else in a kustomization is refused, not ignored. test_kubernetes.py compares the result with Kustomize's own.
"""

import copy

import yaml

KNOWN = {"apiVersion", "kind", "resources", "components", "namespace", "labels", "images", "patches"}
CLUSTER_WIDE = {"Namespace"}
MERGE_KEYS = {"containers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath"}


def render(folder):
    """The objects of a kustomization, in no particular order."""
    return _apply(folder, [])


def _apply(folder, objects):
    """`objects`, with what the kustomization in `folder` adds to them and changes."""
    spec = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(spec) - KNOWN:
        raise NotImplementedError(f"{folder}: {unknown}")
    for name in spec.get("resources", []):
        path = folder / name
        objects = objects + (render(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text())))
    for name in spec.get("components", []):
        objects = _apply(folder / name, objects)
    for patch in spec.get("patches", []):
        objects = _patched(folder, objects, patch)
    for one in objects:
        if "namespace" in spec and one["kind"] not in CLUSTER_WIDE:
            one["metadata"]["namespace"] = spec["namespace"]
        for labels in spec.get("labels", []):
            one["metadata"].setdefault("labels", {}).update(labels["pairs"])
        for container in one["spec"]["template"]["spec"]["containers"] if one["kind"] == "Deployment" else []:
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
    found = [one for one in objects if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    if not found and "target" in patch:
        return objects
    if len(found) != 1:
        raise ValueError(f"{folder}: a patch for {len(found)} objects {kind}/{name}")
    new = _merge(found[0], change) if "path" in patch else _operated(found[0], yaml.safe_load(patch["patch"]))
    return [new if one is found[0] else one for one in objects]


def _merge(old, new, field=None):
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: _merge(old.get(key), new.get(key, old.get(key)), key) for key in old | new}
    if isinstance(old, list) and field in MERGE_KEYS:
        key = MERGE_KEYS[field]
        before, after = ({one[key]: one for one in both} for both in (old, new))
        return [_merge(before.get(name), after.get(name, before.get(name))) for name in before | after]
    return new


def _operated(one, operations):
    one = copy.deepcopy(one)
    for operation in operations:
        *way, last = operation["path"].strip("/").split("/")
        place = one
        for step in way:
            place = place[int(step) if isinstance(place, list) else step]
        last = int(last) if isinstance(place, list) else last
        if operation["op"] == "test":
            if place[last] != operation["value"]:
                raise ValueError(f"{operation['path']} is {place[last]}")
        elif operation["op"] == "replace":
            place[last] = operation["value"]
        else:
            raise NotImplementedError(operation["op"])
    return one
