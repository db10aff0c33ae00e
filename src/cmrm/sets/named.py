NAMED = {}


class NamedSet: ...
