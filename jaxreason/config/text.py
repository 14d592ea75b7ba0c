"""YAML as plain values: one document of text keys, without the features by which a small file is a large or an endless value."""

from typing import Any

import yaml

from jaxreason.errors import UserError


class _Loader(yaml.SafeLoader):
    """No aliases, which make billions of values of ten lines, or one that contains itself; no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(None, None, f"alias *{event.anchor}: write the value out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.MarkedYAMLError(None, None, f"key {name!r} is not text; quote it", key.start_mark)
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {name} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(text: str | bytes, where: str) -> Any:
    """The value of a YAML text; ``where`` names it in messages. Raises UserError, also for bytes that are not UTF-8."""
    try:
        return yaml.load(text.decode("utf-8") if isinstance(text, bytes) else text, Loader=_Loader)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # of !!int x, !!float, 2024-99-99 …
        raise UserError(f"{where}: not valid YAML: a value that cannot be read ({error})") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: nested too deeply") from None
