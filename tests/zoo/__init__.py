"""A zoo of architectures: of every one the values agree with per-example autograd, or an error refuses it."""

from tests.zoo import decoders, encoders, plain, sight_and_sound

ZOO = {**decoders.ENTRIES, **encoders.ENTRIES, **sight_and_sound.ENTRIES, **plain.ENTRIES}
