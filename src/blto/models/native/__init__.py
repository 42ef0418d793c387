"""Residual nets on CPUs with AMX: a small C++ library, its operations under autograd, and the nets made of them.

It is an extra: built when blto is installed, where there is a compiler that knows the instructions, and used where the
processor has them. Everywhere else the plain torch modules, which it is tested against, do the same work.
"""
