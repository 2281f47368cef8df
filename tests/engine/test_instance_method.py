"""Methods of one object are replaced, and what was there before comes back exactly."""

from __future__ import annotations

from collections.abc import Callable

from tokencomp.torchlib.replace import MethodReplacement


class Greeter:
    def greet(self, name: str) -> str:
        return f"hello {name}"


def loudly(original: Callable[[str], str], name: str) -> str:
    return original(name).upper()


def test_a_method_of_the_class_comes_back() -> None:
    greeter, other = Greeter(), Greeter()
    replacement = MethodReplacement(greeter, "greet", loudly)
    assert greeter.greet("you") == "HELLO YOU"
    assert other.greet("you") == "hello you"
    replacement.remove()
    replacement.remove()
    assert vars(greeter) == {}


def test_an_attribute_of_the_object_comes_back() -> None:
    greeter = Greeter()
    earlier = greeter.greet = lambda name: f"good morning {name}"
    replacement = MethodReplacement(greeter, "greet", loudly)
    assert greeter.greet("you") == "GOOD MORNING YOU"
    replacement.remove()
    assert vars(greeter) == {"greet": earlier}


def test_a_later_replacement_by_others_stays() -> None:
    greeter = Greeter()
    replacement = MethodReplacement(greeter, "greet", loudly)
    ours = greeter.greet
    later = greeter.greet = lambda name: ours(name) + "!"
    assert greeter.greet("you") == "HELLO YOU!"
    replacement.remove()
    assert vars(greeter) == {"greet": later}
    assert greeter.greet("you") == "hello you!"
    again = MethodReplacement(greeter, "greet", loudly)
    assert greeter.greet("you") == "HELLO YOU!"
    again.remove()
    assert vars(greeter) == {"greet": later}


def test_a_method_that_does_not_exist_is_not_added() -> None:
    greeter = Greeter()
    replacement = MethodReplacement(greeter, "leave", loudly)
    assert not hasattr(greeter, "leave")
    replacement.remove()
    assert vars(greeter) == {}
