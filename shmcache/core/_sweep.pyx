# cython: binding=False
"""placeholder"""
