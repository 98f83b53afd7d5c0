"""One operation of the model a module, each in the operators of every profile."""
