"""Faults injected into small real training runs, and healthy runs beside them: is the first finding the fault?"""
